"""What spreads a run over processes, and how the processes watch and answer for each other.

Starting them is `launch/`; what is sharded by the plan's arithmetic is `plan/`.
"""
