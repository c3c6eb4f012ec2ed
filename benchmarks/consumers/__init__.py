"""Programs that run an exported model in its real consumer and print what it predicts; each needs only that consumer.

`python FILE MODEL WINDOWS.json OUT.json`: WINDOWS is a list of lists of token ids, OUT the most likely next token after
every one of them but the last, in the same nesting. They import nothing of halfweight, for they run in environments of
their own.
"""
