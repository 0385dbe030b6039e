"""Integrations with other libraries, imported as ``saliency_reg.integrations``.

Each is a module or a package of its own and imports its library only when it is used. ``shared`` is what several
of them need.
"""
