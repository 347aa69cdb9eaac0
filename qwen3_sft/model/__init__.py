"""A model from its folder to the moment it trains: checked, loaded, patched, compiled.

Facts of a family are `families/`; the patches themselves `monkey_patch/`.
"""
