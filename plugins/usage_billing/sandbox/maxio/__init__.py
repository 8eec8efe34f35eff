"""Maxio: the main API and the events host of a site, and how it bills."""
