"""No models: the tables are greenjobs' own. Django tells only apps with this module when it has migrated."""
