-- What telco's packages owe for $first_day to $last_day (days in Chicago, both included); account NULL is the total.
-- The rules stand here a second time on purpose: this is the figure that the bill is judged by.
WITH good AS (
    SELECT call_id, package_key, minutes
    FROM voip_calls
    WHERE (started_at AT TIME ZONE 'America/Chicago')::DATE BETWEEN $first_day AND $last_day
      AND started_at >= timezone('America/Chicago', $bill_from::TIMESTAMP)
      AND package_key BETWEEN 'pkg-001' AND 'pkg-008'
      AND minutes >= 0
      AND minutes % 0.01 = 0
),
one_of_each AS (
    SELECT any_value(package_key) AS account, any_value(minutes) AS minutes FROM good GROUP BY call_id
)
SELECT account, sum(minutes) AS quantity
FROM one_of_each
GROUP BY ROLLUP (account)
ORDER BY account NULLS LAST;
