"""Small models that you can train yourself: scenes, clips, tokenizer, models, training, evaluation.

The checkpoints that come out are ordinary folders in the layouts of the published models, and
`vlmlib.load` reads them like any other.
"""
