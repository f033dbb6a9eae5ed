"""Puzzles: texts with questions that only those can answer who find what lies in them (the kinds of RULER, and MQAR).

    puzzle.py   what a puzzle is, and how it is laid into exactly so many tokens
    values.py   values of names: one in repeated noise, of one of many names, of several, all of one
    chains.py   names that stand for each other: variable tracking
    words.py    words that occur more often than others
    mix.py      the rows that training mixes in

A kind is a frozen dataclass of its sizes with `make(rng, tokens, encode, held_out)`. Names and words are split for
good by the checksum of nsa.training.retrieval: training and evaluation share none.

Source of the kinds: C.-P. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
2024; MQAR: S. Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023. What is
written is our own: lines of code, random names and digits.
"""
