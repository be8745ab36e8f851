"""The methods: what they drop, what they grow, and when.

rigl         RigL, SET and SNFS
mask_update  what these share: drop, share out, grow
pruning      gradual magnitude pruning
one_shot     SNIP
"""
