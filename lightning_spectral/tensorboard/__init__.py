"""The tab SPECTRAL of TensorBoard: rank curves, heat maps, spectra and exponents, read from run folders.

``entry`` is what TensorBoard loads, ``plugin`` answers its requests, ``folders`` finds runs, ``reader`` reads them as
they grow, ``answers`` makes what the page (``static/``) draws. Nothing here imports torch, Lightning or matplotlib.
"""
