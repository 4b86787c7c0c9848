//! Waiting without fixed sleeps: poll a condition until it holds or a deadline has passed.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

/// Time between two looks: short against what is waited for, long against the cost of a look.
const PAUSE: Duration = Duration::from_millis(20);

/// Calls `condition` until it returns `Ok`; after `deadline` fails with `what` and the last `Err`.
///
/// The `Err` of the condition is what was seen instead, so `anyhow::ensure!` reads well in it. A call that hangs is
/// dropped at the deadline.
pub async fn until<T, E, F, Fut>(what: &str, deadline: Duration, mut condition: F) -> Result<T>
where
    E: Display,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
{
    let end = Instant::now() + deadline;
    let mut seen = String::from("nothing: the first look did not come back");
    loop {
        match tokio::time::timeout_at(end, condition()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => seen = format!("{error:#}"),
            Err(_) => bail!("waited {deadline:?} for {what}; last seen: {seen}"),
        }
        if Instant::now() + PAUSE >= end {
            bail!("waited {deadline:?} for {what}; last seen: {seen}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn returns_the_value_once_the_condition_holds() {
        let mut looks = 0;
        let value = until("three looks", Duration::from_secs(5), || {
            looks += 1;
            let looks = looks;
            async move { if looks == 3 { Ok(looks) } else { Err("not yet") } }
        })
        .await;
        assert_eq!(value.expect("holds at the third look"), 3);
    }

    #[tokio::test]
    async fn says_what_was_waited_for_and_what_was_seen_last() {
        let mut looks = 0;
        let error = until("the impossible", Duration::from_millis(100), || {
            looks += 1;
            let looks = looks;
            async move { Err::<(), _>(format!("look {looks}")) }
        })
        .await
        .expect_err("never holds");
        let text = error.to_string();
        assert!(text.contains("the impossible") && text.contains("last seen: look "), "{text}");
    }

    #[tokio::test]
    async fn a_hanging_look_does_not_outlive_the_deadline() {
        let hang = || std::future::pending::<Result<(), String>>();
        let error = until("an answer", Duration::from_millis(50), hang).await.expect_err("hangs");
        assert!(error.to_string().contains("did not come back"), "{error}");
    }
}
