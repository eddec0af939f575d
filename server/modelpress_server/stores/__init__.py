"""What the server keeps: records in SQL, blobs as files."""
