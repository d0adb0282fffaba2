"""What makes greenjobs at home in other frameworks; a module needs the packages that it imports at its top."""
