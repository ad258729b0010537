"""The stream engine: a token is a chain of four launches per layer, each a stream of weights.

``spec.py`` reads the layers of a model. ``chain.py`` makes the launches over ``buffers.py``.
``probe.py`` shows that these compute what the layers compute. ``engine.py`` runs them in the decode
loop. The kernels are in the folders of ``cats/ops``; docs/kernels.md follows a token through them.
"""
