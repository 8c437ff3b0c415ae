"""A tiny LLaVA that you can train yourself: scenes, tokenizer, model, training, evaluation.

Nothing in here imports the rest of `vlmlib`: the checkpoint it makes is an ordinary
`LlavaForConditionalGeneration` folder, and that folder is the only interface.
"""
