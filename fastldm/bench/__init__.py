"""How fast a model is here, beside diffusers and torch.compile: same weights, same inputs, in turn.

Each contender is a process of its own (`worker`), so that none sees another's settings, caches or memory;
`lineup` starts them, holds what they compute to a float32 reference, and lets those that agree race.
"""
