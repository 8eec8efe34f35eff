-- What orbit's accounts owe for $first_day to $last_day (days in UTC, both included); account NULL is the total.
-- The rules stand here a second time on purpose: this is the figure that the bill is judged by.
WITH good AS (
    SELECT event_id, account_id, units
    FROM platform_events
    WHERE (occurred_at AT TIME ZONE 'UTC')::DATE BETWEEN $first_day AND $last_day
      AND occurred_at >= timezone('UTC', $bill_from::TIMESTAMP)
      AND account_id BETWEEN 'orbit-01' AND 'orbit-10'
      AND units >= 0
      AND units % 0.001 = 0
),
one_of_each AS (
    SELECT any_value(account_id) AS account, any_value(units) AS units FROM good GROUP BY event_id
)
SELECT account, sum(units) AS quantity
FROM one_of_each
GROUP BY ROLLUP (account)
ORDER BY account NULLS LAST;
