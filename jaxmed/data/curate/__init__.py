"""Curation: which records of a corpus are worth training on, and which of an evaluation set it holds already.

Nothing is copied or removed. What is kept is a selection, a small file beside the corpus that
`open_source('CORPUS@NAME')` reads (see `selection`). Each way to select is one file: `hashes` (near-duplicates by
difference hash), `measures` (SSIM, mutual information, entropy), `features` (cosine of embeddings), `semdedup`,
`balance` (hierarchical k-means), `quality`. `leakage` compares a corpus with an evaluation set; `run` does what `jaxmed
curate` asks for.
"""
