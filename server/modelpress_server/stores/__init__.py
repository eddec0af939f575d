"""What the server keeps: records in SQL, blobs as files or in a bucket.

`jobs`, `models`, `blobs` and their like hold frozen records and the protocols of stores; `sql_*`, `filesystem` and `s3`
implement them. Unless a method says otherwise it is a coroutine and one transaction: after a kill it has happened as a
whole or not at all. A record holds the protobuf message of its resource; treat it as read-only.
"""
