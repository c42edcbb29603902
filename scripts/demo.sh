#!/usr/bin/env bash
# From a fresh clone to pictures: installs, trains a LoRA on the bundled model and data, compares base and LoRA, measures.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
# For a model this small one thread is nearly as fast as two, and not stalled by whatever else is running.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

torchrun train_lora.py --rank 8 --bs 3
python infer.py --compare
python scripts/evaluate.py

echo
echo "What it learned:              $PWD/checkpoints/report.html"
echo "Pictures, base beside LoRA:   $PWD/images/compare.png"
echo "TensorBoard:                  source .venv/bin/activate && tensorboard --logdir runs"
