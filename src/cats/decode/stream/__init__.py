"""The stream engine: a token as a chain of few launches a layer, each a stream of weights.

``spec.py`` reads the layers of a model, ``chain.py`` lays out the launches over ``buffers.py``,
``probe.py`` shows that these compute what the layers compute, ``engine.py`` puts them behind the
decode loop.
The kernels are in the folders of ``cats/ops``; docs/kernels.md follows a token through them.
"""
