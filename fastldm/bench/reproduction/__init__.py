"""The findings of the papers, small but real: one-object scenes of 64 x 64 pixels, nets of at most 1.5
million parameters, several seeds.

`settings` says how large all is, `world` draws the pictures, `nets` and `lab` train and sample, `cells` keeps
what was measured in a file, `tables` sets it out and holds it to the papers' bars, `command` is
`fastldm bench ddim | tradeoff | objectives | guidance`.
"""
