"""Integrations with other libraries, imported as ``saliency_reg.integrations``.

Each is a module of its own and imports its library only when it is used. ``report_figures`` and ``relation_image`` are for
those that have trackers.
"""
