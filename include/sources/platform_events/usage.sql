-- One row per platform event. What may not be billed is not filtered here: quarantine tells it by name.
SELECT event_id, occurred_at, account_id, region, tier, units
FROM platform_events
WHERE occurred_at >= :window_start AND occurred_at < :window_end
