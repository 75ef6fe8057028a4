"""Records and batches: readers, `prepare`, the corpus on disk, sources and the Grain pipeline.

Nothing here knows of models. A corpus is a folder that `prepare` writes and `open_source` reads;
`train_batches` and `eval_batches` turn a source into dicts of arrays.
"""
