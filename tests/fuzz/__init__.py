"""Damaged and contradictory checkpoints by the thousand: each loads right or is refused clearly.

===========  =========================================================================================
module       what it does
===========  =========================================================================================
checkpoint   a checkpoint in memory: configurations, tensors, index, and how to write them to a folder
bases        the undamaged ones: architectures, widths, groups, orders, layouts
mutations    what is done to them, by kind; ``cases`` picks one by seed, kind and number
truth        what the files mean, read by code that shares nothing with graftq; the float twin
verdict      loads and inspects one case, and says what came of it
pool         worker processes with a limit of time for each case
run          the command for many cases; ``test_fuzz`` runs some 300 of them
===========  =========================================================================================
"""
