//! The TCP proxy against a server that sends back what it gets.
#![allow(clippy::disallowed_methods, reason = "a test with peers of its own")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_testkit::proxy::tcp::{Direction, TcpProxy};
use farshore_testkit::wait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(10);

/// Sends back what it gets, and closes when its client does.
async fn echo() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    Ok(address)
}

async fn round_trip(stream: &mut TcpStream, text: &[u8]) -> Result<Duration> {
    let begin = Instant::now();
    stream.write_all(text).await?;
    let mut back = vec![0; text.len()];
    timeout(SOON, stream.read_exact(&mut back)).await.context("nothing came back")??;
    ensure!(back == text);
    Ok(begin.elapsed())
}

#[tokio::test]
async fn passes_bytes_and_half_closes_and_counts() -> Result<()> {
    let proxy = TcpProxy::start(echo().await?).await?;
    let mut stream = TcpStream::connect(proxy.address()).await?;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|number| number as u8).collect();
    let (mut from, mut to) = stream.split();
    let mut back = Vec::new();
    let send = async {
        to.write_all(&sent).await?;
        to.shutdown().await
    };
    timeout(SOON, async { tokio::try_join!(send, from.read_to_end(&mut back)) }).await.context("no end came")??;
    ensure!(back == sent);
    ensure!(proxy.bytes(Direction::Forward) == 3_000_000 && proxy.bytes(Direction::Back) == 3_000_000);
    ensure!(proxy.connections() == 1);
    Ok(())
}

#[tokio::test]
async fn delays_each_way_without_slowing_the_flow() -> Result<()> {
    let proxy = TcpProxy::start(echo().await?).await?;
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"warm").await?;
    proxy.set_delay(Duration::from_millis(100));
    let took = round_trip(&mut stream, b"ping").await?;
    ensure!(took >= Duration::from_millis(200), "took {took:?}");
    // A hundred chunks are on their way together.
    let (mut from, mut to) = stream.split();
    let mut back = vec![0; 1_600_000];
    let begin = Instant::now();
    tokio::try_join!(to.write_all(&[7; 1_600_000]), from.read_exact(&mut back))?;
    let took = begin.elapsed();
    ensure!(took < Duration::from_secs(4), "took {took:?}, one delay for each chunk would be 20 s");
    Ok(())
}

#[tokio::test]
async fn caps_the_bandwidth_of_all_connections_together() -> Result<()> {
    let proxy = TcpProxy::start(echo().await?).await?;
    proxy.set_bandwidth(Some(1_000_000));
    let begin = Instant::now();
    let one = async { round_trip(&mut TcpStream::connect(proxy.address()).await?, &[1; 300_000]).await };
    let two = async { round_trip(&mut TcpStream::connect(proxy.address()).await?, &[2; 300_000]).await };
    tokio::try_join!(one, two)?;
    let took = begin.elapsed();
    ensure!(took >= Duration::from_millis(590), "600 kB at 1 MB/s took {took:?}");
    Ok(())
}

#[tokio::test]
async fn a_cut_closes_and_refuses_until_healed() -> Result<()> {
    let proxy = TcpProxy::start(echo().await?).await?;
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"before").await?;
    proxy.cut().await?;
    let end = timeout(SOON, stream.read(&mut [0; 8])).await.context("the connection stays open")?;
    ensure!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    let refused = TcpStream::connect(proxy.address()).await.expect_err("nobody listens");
    ensure!(refused.kind() == std::io::ErrorKind::ConnectionRefused, "{refused}");
    proxy.heal().await?;
    round_trip(&mut TcpStream::connect(proxy.address()).await?, b"after").await?;
    Ok(())
}

#[tokio::test]
async fn a_held_direction_keeps_its_bytes_and_loses_none() -> Result<()> {
    let proxy = TcpProxy::start(echo().await?).await?;
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"before").await?;
    proxy.hold(Direction::Back);
    stream.write_all(b"during").await?;
    // Forward still flows, nothing comes back, and the connection does not end.
    let arrived = || async {
        let bytes = proxy.bytes(Direction::Forward);
        if bytes == 12 { Ok(()) } else { Err(bytes) }
    };
    wait::until("the bytes to arrive", SOON, arrived).await?;
    let mut back = [0; 6];
    let silent = timeout(Duration::from_millis(300), stream.read_exact(&mut back)).await;
    ensure!(silent.is_err() && proxy.bytes(Direction::Back) == 6, "{silent:?}");
    proxy.heal().await?;
    timeout(SOON, stream.read_exact(&mut back)).await.context("held for ever")??;
    ensure!(&back == b"during");
    Ok(())
}

#[tokio::test]
async fn an_unreachable_target_looks_like_a_closed_connection() -> Result<()> {
    let nobody = farshore_testkit::ports::Port::take()?;
    let proxy = TcpProxy::start(nobody.address()).await?;
    let mut stream = TcpStream::connect(proxy.address()).await?;
    let end = timeout(SOON, stream.read(&mut [0; 8])).await.context("the connection stays open")?;
    ensure!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    Ok(())
}
