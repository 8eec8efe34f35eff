-- One row per API request. What may not be billed is not filtered here: quarantine tells it by name.
SELECT request_id, requested_at, account_ref, calls
FROM api_calls
WHERE requested_at >= :window_start AND requested_at < :window_end
