"""Judges what was trained, by protocols that anyone can repeat.

    alignment    do pictures show what their prompts say (shapes world)
    protocol     drawn pictures against real ones: features in blocks, the metrics over them
    stages       one trained stage (`trained`) by its own metrics; what more is asked of CLIP is in `clip`
    sweep        the protocol over settings: the frontier of fit and fidelity
    report       numbers as JSON, Markdown and a page; two reports side by side
    pairs        a page for people who choose between pictures, and what their votes say
"""
