#!/usr/bin/env bash
# The runs of Table 2 of the ResLoRA paper: RoBERTa-large on eight tasks of GLUE. Not run by us: they need a GPU.
#
#     examples/paper_glue.sh            # all tasks; 64 runs
#     examples/paper_glue.sh rte mrpc   # some
#
# From the paper (Appendix C): the settings of paper_language.sh, without DeepSpeed. The learning rate, the batch size and
# the number of epochs are the defaults of train_glue.py: the paper does not give them.
set -euo pipefail
cd "$(dirname "$0")/.."

model=${MODEL:-FacebookAI/roberta-large}
tasks=("$@")
[ $# -gt 0 ] || tasks=(mnli sst2 mrpc cola qnli qqp rte stsb)

train() { # task, name of the run, options of its method
    accelerate launch train_glue.py --model_name_or_path "$model" --task_name "$1" --output_dir "runs/paper/$1/$2" "${@:3}" \
        --eval_strategy epoch --save_best
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
