"""The methods: what they drop, what they grow, and when.

rigl            RigL, SET and SNFS
mask_update     the common update: drop, share out, grow
granet          GraNet: RigL with a falling density
srigl           SRigL: RigL with a constant fan-in
gse             GSE: growth by gradient within a random subset
mest            MEST: random growth within a soft bound
single_weights  a warning of SRigL and SR-STE where masks have no pattern
first_counts    the first counts of layers, for MEST and SRigL
stored_weights  Top-KAST and SR-STE, which train weights outside the masks
pruning         gradual magnitude pruning
acdc            AC/DC: alternating sparse and dense phases
one_shot        SNIP, GraSP, SynFlow and magnitude
"""
