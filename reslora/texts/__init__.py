"""Train language models with ResLoRA and other adapters, on the paper's tasks.

options = resolve(LlmOptions, {"shortcut": "input"})            # arguments.py
texts = LlmTexts()                                              # llm.py, or glue.py: examples, model and metrics
study = TextStudy(schedule, identity, context, texts)           # study.py: what the training loop and experiments see
table = merge_table(model, evaluate, calibration)               # results.py: unmerged and merged by every method
export(model, folder, options.adapter, calibration)             # plain LoRA in folder/peft

The scripts train_llm.py and train_glue.py at the root of the repository call `experiment.start_texts`.
"""
