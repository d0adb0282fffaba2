"""Checks of the tables: whether they are as the migrations made them, and whether vacuum keeps them small."""

from __future__ import annotations

import re

from greenjobs import migrate
from greenjobs.doctor.case import Case, Check
from greenjobs.doctor.finding import Limits, Verdict, fail, ok, several, skipped, warn
from greenjobs.inspection import fitness

_MADE_INDEX = re.compile(r"\bCREATE (?:UNIQUE )?INDEX (?:CONCURRENTLY )?(?:IF NOT EXISTS )?(\w+)")
_DROPPED_INDEX = re.compile(r"\bDROP INDEX (?:CONCURRENTLY )?(?:IF EXISTS )?(\w+)")

# Those whose rows come and go.
_BUSY = ("background_jobs", "background_history", "background_runners", "background_waiting")

# By which the claim stays fast; a copy of the tables without their options is as slow as PostgreSQL's defaults make it.
_TUNED = "autovacuum_vacuum_scale_factor"
_DEFAULT_THRESHOLD, _DEFAULT_SCALE = 50.0, 0.2

# Autovacuum looks once a minute, by default.
_VACUUM_IS_LATE_SECONDS = 600.0

_NO_TABLES = "the tables are not there yet"

_OFF = ("off", "false", "no", "0")


def tables(case: Case) -> Verdict:
    """Whether the tables are logged that have to be, and the one that changes with every idle moment is not."""
    found = fitness.tables(case.connection())
    if not found:
        return skipped(_NO_TABLES)
    unlogged = [name for name, table in found.items() if not table.is_logged and name != "background_waiting"]
    if unlogged:
        return fail(
            f"not logged: {', '.join(unlogged)}; a crash of the server empties them",
            f"make them logged: {'; '.join(f'ALTER TABLE {name} SET LOGGED' for name in unlogged)}",
        )
    if "background_waiting" in found and found["background_waiting"].is_logged:
        return warn(
            "background_waiting is logged, so that each idle moment of a runner is written to the disk",
            "ALTER TABLE background_waiting SET UNLOGGED",
        )
    return ok("logged are the tables that have to be")


def indexes(case: Case) -> Verdict:
    """Whether all indexes are there, and can be used."""
    found = fitness.indexes(case.connection())
    invalid = sorted(name for name, is_valid in found.items() if not is_valid)
    if invalid:
        return fail(
            f"invalid: {', '.join(invalid)}; no statement uses them, and unique ones may let duplicates through",
            f"{'; '.join(f'REINDEX INDEX CONCURRENTLY {name}' for name in invalid)}",
        )
    missing = sorted(_made_indexes() - found.keys())
    if missing:
        return fail(
            f"missing: {', '.join(missing)}", "make them again, as in the SQL that `greenjobs migrate --sql` prints"
        )
    return ok("all indexes are there, and valid")


def autovacuum(case: Case) -> Verdict:
    """Whether vacuum comes by itself, and early enough."""
    reached = case.connection()
    off = [name for name, value in fitness.settings(reached, "autovacuum", "track_counts").items() if value == "off"]
    if off:
        return fail(
            f"{' and '.join(sorted(off))} {'is' if len(off) == 1 else 'are'} off: vacuum never comes", "turn it on"
        )
    found = fitness.tables(reached)
    disabled = [name for name, table in found.items() if table.options.get("autovacuum_enabled", "on").lower() in _OFF]
    if disabled:
        return fail(
            f"turned off for {', '.join(disabled)}: dead rows stay for ever, and make every statement slower",
            f"{'; '.join(f'ALTER TABLE {name} RESET (autovacuum_enabled)' for name in disabled)}",
        )
    jobs = found.get("background_jobs")
    if jobs is None:
        return skipped(_NO_TABLES)
    if _TUNED not in jobs.options:
        return warn(
            "background_jobs has lost the options that its migration set: vacuum comes when a fifth of it is dead",
            "set them again, as in the SQL that `greenjobs migrate --sql` prints",
        )
    return ok(f"on, and comes to background_jobs after {_due(jobs):,.0f} dead rows")


def dead_rows(case: Case) -> Verdict:
    """Whether vacuum removes what is dead."""
    found = fitness.tables(case.connection())
    if not found:
        return skipped(_NO_TABLES)
    busy = [found[name] for name in _BUSY if name in found]
    for table in busy:
        ago = table.vacuumed_seconds_ago
        is_late = ago is None or ago > _VACUUM_IS_LATE_SECONDS
        if table.dead_rows > case.limits.dead_rows * _due(table) and is_late:
            last = "never" if ago is None else f"{ago / 60:.0f} minutes ago"
            return warn(
                f"{table.name} has {table.dead_rows:,} dead rows beside {table.live_rows:,}; vacuum came last {last}",
                f"see what `snapshots` and `autovacuum` say, then VACUUM {table.name}",
            )
    return ok(", ".join(f"{table.dead_rows:,} in {table.name}" for table in busy))


def snapshots(case: Case) -> Verdict:
    """Who keeps vacuum from removing what is dead by now."""
    holders = fitness.snapshot_holders(case.connection())
    old = [f"{each.kind} {each.name}{_age(each)}" for each in holders if _is_old(each, case.limits)]
    if old:
        return warn(
            f"these keep vacuum from removing what has died since: {several(old, case.limits)}",
            "end them: commit or pg_terminate_backend(pid), ROLLBACK PREPARED, pg_drop_replication_slot(name); "
            "idle_in_transaction_session_timeout ends what is forgotten",
        )
    if not holders:
        return ok("nobody holds one")
    oldest = holders[0]
    return ok(f"the oldest is held by {oldest.kind} {oldest.name}{_age(oldest)}")


CHECKS = (
    Check("tables", tables, needs=("connection",)),
    Check("indexes", indexes, needs=("schema",)),
    Check("autovacuum", autovacuum, needs=("connection",)),
    Check("dead rows", dead_rows, needs=("connection",)),
    Check("snapshots", snapshots, needs=("connection",)),
)


def _made_indexes() -> set[str]:
    """The indexes that the migrations leave behind."""
    names: set[str] = set()
    for migration in migrate.load():
        names |= set(_MADE_INDEX.findall(migration.sql))
        names -= set(_DROPPED_INDEX.findall(migration.sql))
    return names


def _due(table: fitness.Table) -> float:
    """The number of dead rows at which autovacuum is to come to it."""
    options = table.options
    threshold = float(options.get("autovacuum_vacuum_threshold", _DEFAULT_THRESHOLD))
    return threshold + float(options.get(_TUNED, _DEFAULT_SCALE)) * table.live_rows


def _is_old(holder: fitness.Holder, limits: Limits) -> bool:
    if holder.kind == "unused replication slot" or holder.transactions > limits.snapshot_transactions:
        return True
    return holder.seconds is not None and holder.seconds > limits.snapshot_seconds


def _age(holder: fitness.Holder) -> str:
    seconds = "" if holder.seconds is None else f"for {holder.seconds:,.0f} s, "
    return f" ({seconds}{holder.transactions:,} transactions ago)"
