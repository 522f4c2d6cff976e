"""All experts of a mixture-of-experts layer in at most four launches.

The pipeline in the fused form, for T tokens that each choose ``top_k`` of E experts. A *slot* is a token with one of
its experts, numbered ``token * top_k + choice``::

    route      index [T, top_k]          -> slots sorted by expert, in tiles of one expert each
    gather     x [T, H]                  -> [slots, 1, 128 * atoms], in the packed order of each slot's expert
    up         x @ (gate | up).T         -> [slots, 2 * inner], 8 rows of gate alternating with 8 of up
    activate   f(gate + b) * (up + b)    -> [slots, inner], in ``down``'s packed order of inputs
    down       hidden @ down.T           -> [splits, slots, H], partial sums if K is split
    sum        over splits and experts   -> out [T, H], weighted by the router, ``down``'s bias included

``inner`` is the intermediate size padded to whole atoms of 128. Experts without a gate have ``inner`` rows in ``up``.

Several tokens take four launches: route and gather (``kernels/experts_prepare``; it only gathers if act-order has moved
rows of ``up``), up and activate (``experts_gemm``), down (``experts_gemm``), and sum (``experts_sum``). A single token
takes two, and one more to gather for act-order: nothing is routed, and ``down`` (``experts_gemv``) also takes the sum.
"""
