"""All experts of a mixture-of-experts layer in at most four launches.

The pipeline, for T tokens that each choose ``top_k`` of E experts (a *slot* is one token with one of its experts)::

    route      index [T, top_k]          -> slots sorted by expert, cut into tiles of one expert each
    gather     x [T, K]                  -> x in the order of each expert's packed rows (act-order only)
    up         x @ (gate | up).T         -> [slots, 2 * intermediate], gate and up rows interleaved by eights
    activate   f(gate) * up              -> [slots, intermediate], in the last step of ``up``
    down       hidden @ down.T           -> [slots, hidden], partial sums if K is split
    sum        over a token's slots      -> y [T, hidden], weighted by the router

Route and gather share one launch (``kernels/experts_prepare``); up and activate are one (``experts_gemm``, or
``experts_gemv`` for a single token), down is one, and the sum is one (``experts_sum``; for a single token it is the
last step of ``down``).
"""
