-- One row per telephone call. What may not be billed is not filtered here: quarantine tells it by name.
SELECT call_id, started_at, package_key, minutes
FROM voip_calls
WHERE started_at >= :window_start AND started_at < :window_end
