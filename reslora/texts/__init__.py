"""Train language models with ResLoRA and other adapters in transformers' `Trainer`, on the paper's tasks.

adapter = resolve(LlmOptions, {"shortcut": "input"}).adapter    # arguments.py
model = attach(model, adapter, total_steps=1000)                # trainer.py
trainer = AdapterTrainer(model, args, train_dataset=..., callbacks=[LogCallback("run/log.jsonl")])
trainer.train()
table = merge_table(model, trainer.evaluate, calibration)       # results.py: unmerged and merged by every method
export(model, "run", adapter, calibration)                      # plain LoRA in run/peft

The scripts train_llm.py and train_glue.py at the root of the repository call `experiment.run` with an `LlmStudy` or a
`GlueStudy`.
"""
