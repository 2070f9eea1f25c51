"""Processes of a run on this machine: started, watched, told to stop. No torch at import."""
