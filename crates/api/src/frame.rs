//! The checksum of frames: what a site acts upon is what the other one said, whatever happened in between.

use crate::replication::v1::{Batch, Frame, frame::Body};

impl Frame {
    /// A frame that carries `body` and its checksum.
    pub fn of(body: Body) -> Self {
        Self { crc: checksum(&body), body: Some(body) }
    }

    /// Whether it is as it was made. One of a kind this version does not know cannot be told, and is not acted upon.
    pub fn is_intact(&self) -> bool {
        self.body.as_ref().is_none_or(|body| checksum(body) == self.crc)
    }
}

/// CRC-32 of the body's encoding, of the fields of protocol version 1 only; a batch's record has a checksum of its own.
fn checksum(body: &Body) -> u32 {
    let encoded = |body: &Body| {
        let mut bytes = Vec::with_capacity(body.encoded_len());
        body.encode(&mut bytes);
        crc32fast::hash(&bytes)
    };
    match body {
        Body::Batch(batch) => encoded(&Body::Batch(Batch {
            source: batch.source.clone(),
            epoch: batch.epoch,
            term: batch.term,
            record: bytes::Bytes::new(),
            begins: batch.begins,
        })),
        other => encoded(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    use crate::replication::v1::{Ack, Fetched, Position};

    #[test]
    fn any_change_of_a_body_is_noticed() {
        let ack = Ack { source: "north".into(), applied: Some(Position { time: 7, ordinal: 1 }), ..Ack::default() };
        let fetched =
            Fetched { id: 1, at: 9, documents: vec![vec![5; 40].into(), vec![].into()], ..Fetched::default() };
        let batch = Batch { source: "north".into(), epoch: 1, term: 2, record: vec![1; 9].into(), begins: false };
        let mut changed = 0;
        for body in [Body::Ack(ack), Body::Fetched(fetched), Body::Batch(batch)] {
            let frame = Frame::of(body);
            assert!(frame.is_intact());
            assert!(Frame::decode(frame.encode_to_vec().as_slice()).expect("decode").is_intact());
            let bytes = frame.encode_to_vec();
            for bit in 0..bytes.len() * 8 {
                let mut other = bytes.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                let Ok(decoded) = Frame::decode(other.as_slice()) else { continue };
                let of_the_record = |frame: &Frame| match &frame.body {
                    Some(Body::Batch(batch)) => {
                        Some(Frame::of(Body::Batch(Batch { record: vec![].into(), ..batch.clone() })))
                    }
                    _ => None,
                };
                let told = !decoded.is_intact() || decoded.body.is_none();
                let not_ours =
                    decoded == frame || of_the_record(&decoded).is_some_and(|bare| Some(bare) == of_the_record(&frame));
                assert!(told || not_ours, "bit {bit} of {frame:?} went unnoticed: {decoded:?}");
                changed += 1;
            }
        }
        assert!(changed > 300, "{changed}");
    }
}
