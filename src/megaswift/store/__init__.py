"""Files that appear whole: publishing, manifests, locks, retention, the cache."""
