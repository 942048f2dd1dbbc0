"""What is kept in Redis, under which keys and as which bytes. No logic and no Redis.

Read keys.py first, then groups.py; entries.py turns records to the text of stream entries, packing.py and blobs.py groups to bytes.
"""
