"""Look inside a trained model: what its attention and its Mamba heads do on a text.

`run.analyze` measures any `Hymba`, whatever its layers mix tokens with; `report.write` makes figures of what that
returns. What each analysis measures, and how to read it, is in docs/analysis.md.

    observe.py     hear every operation of every layer during a forward pass
    attention.py   attention mass by category, entropy, what each meta token gets        (paper, figures 5 and 7)
    branches.py    output and gate magnitudes of both branches, removal of one           (figures 3, 12, 13)
    memory.py      how far back a token matters, how long an SSM channel remembers       (figure 11)
    texts.py       what is read
    run.py         all of it, as one dict of numbers
    plots.py       figures of that dict; report.py writes the folder
"""

ANALYSES = ("attention", "meta", "importance", "receptive-field", "magnitudes", "memory")
