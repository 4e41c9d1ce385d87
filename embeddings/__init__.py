"""Ids to rows: the only folder that builds TorchRec or FBGEMM modules."""
