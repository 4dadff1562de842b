"""Intermediate error signals: losses on the states of single layers, which nudge every layer and not the last alone.

After Lin, Bal & Sengupta (arXiv:2508.15989). The nudge of a loss on the logits fades on its way down; a loss on a
layer's own state reaches that layer at full strength. All losses of a step are added and enter one nudged phase:

    L = L_out(s_N) + Σ_l α_l L_l(s_l),        force on layer l: −β λ^(N−l) (∂L_out/∂s_l + α_l ∂L_l/∂s_l).

A signal's own parameters (classifiers, projections) only ever see their layer's state, at the free equilibrium (with
live forces at the nudged states), so their gradient is local, and exact. They belong to training and are no part of the
model.
"""
