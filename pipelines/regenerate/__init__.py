"""regenerate: the user's turns of conversations stay, and the target answers them anew.

A file each: what can be chosen (config), the questions (questions), who answers them (answerer: the protocol;
endpoint: a server; local: this machine; reply: what was said), the conversations (talk, work), the file of
answers (answers), the record beside it (record), and the whole (run).
"""
