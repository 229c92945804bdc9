#!/usr/bin/env bash
# The runs of Tables 1, 3, 6 and 7 of the ResLoRA paper: LLaMA2-7B on five tasks. Not run by us: they need GPUs.
#
#     examples/paper_language.sh              # all tasks; 40 runs
#     examples/paper_language.sh svamp gsm8k  # some
#
# From the paper (Appendix C): rank 4 and alpha 8 (LoRA also with rank 16), query and value projections, pre_num 4, ZeRO-2
# that keeps its state in the CPU's memory, no shortcut term for the first block of a chain, 40,000 examples of MetaMathQA
# (the default), the best epoch. The paper does not give the learning rate, the batch size, or, but for SVAMP (20), the
# number of epochs. Each run's results.json has the accuracy without a merge and by each merge, which is Table 3.
set -euo pipefail
cd "$(dirname "$0")/.."

model=${MODEL:-meta-llama/Llama-2-7b-hf}
tasks=("$@")
[ $# -gt 0 ] || tasks=(gsm8k svamp mathqa metamathqa hellaswag)

train() { # task, name of the run, options of its method
    accelerate launch train_llm.py --model_name_or_path "$model" --task "$1" --output_dir "runs/paper/$1/$2" "${@:3}" \
        --bf16 --deepspeed assets/deepspeed/zero2_offload.json --gradient_checkpointing \
        --learning_rate 1e-4 --per_device_train_batch_size 8 --num_train_epochs 20 --eval_strategy epoch --save_best
}

for task in "${tasks[@]}"; do
    train "$task" lora-r16 --method lora --lora_r 16
    for method in lora adalora loha lokr; do
        train "$task" "$method" --method "$method"
    done
    train "$task" reslora-input --method reslora --shortcut input --head none --merge weights
    train "$task" reslora-block --method reslora --shortcut block --pre_num 4
    train "$task" reslora-middle --method reslora --shortcut middle --pre_num 4 --merge input
done
