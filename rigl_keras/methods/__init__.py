"""The methods: what they drop, what they grow, and when.

rigl            RigL, SET and SNFS
mask_update     what these and others share: drop, share out, grow
granet          GraNet: RigL under a density that falls
srigl           SRigL: RigL with a constant fan-in
gse             GSE: growth by gradient within a random subset
mest            MEST: random growth within a soft bound
first_counts    what MEST and SRigL remember: how layers began
stored_weights  Top-KAST and SR-STE, which train weights outside the masks
pruning         gradual magnitude pruning
acdc            AC/DC: sparse and dense phases, by turns
one_shot        SNIP, GraSP, SynFlow and magnitude
"""
