"""What can be set on a command line: the options of training, and how a command is read. Nothing here imports PyTorch."""
