"""The run folder and what is written into it: options, environment, one line per step.

Whose a folder is, who works in it and what is refused therefore is decided here too. What the lines
hold is computed in `training/`.
"""
