//! The least HTTP client: one GET on the agent's plain port.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An agent that is stopped accepts connections but says nothing.
const ANSWER: Duration = Duration::from_secs(2);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub body: String,
}

/// GETs `path`; HTTP/1.0, so the body ends with the connection and is never chunked.
pub async fn get(address: SocketAddr, path: &str) -> Result<Reply> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).await?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).await?;
        std::io::Result::Ok(reply)
    };
    let reply = timeout(ANSWER, exchange).await.with_context(|| format!("GET {path}: no answer within {ANSWER:?}"))?;
    let reply = reply.with_context(|| format!("GET {path}"))?;
    parse(&String::from_utf8_lossy(&reply)).with_context(|| format!("GET {path}: not an HTTP reply"))
}

fn parse(reply: &str) -> Option<Reply> {
    let (head, body) = reply.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some(Reply { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_read_and_garbage_is_refused() {
        let reply = parse("HTTP/1.0 503 Service Unavailable\r\ncontent-type: text/plain\r\n\r\nseeding\n");
        assert_eq!(reply, Some(Reply { status: 503, body: "seeding\n".to_owned() }));
        assert_eq!(parse("HTTP/1.1 200\r\n\r\n").map(|reply| reply.status), Some(200));
        assert_eq!(parse("SSH-2.0-OpenSSH\r\n\r\n"), None);
        assert_eq!(parse(""), None);
    }
}
