//! The few write commands apply uses, as a MongoDB server runs them, on documents held in memory.

use bson::raw::{RawBsonRef, RawDocument, RawDocumentBuf};
use bson::{Bson, Document};
use bytes::Bytes;
use farshore::model::{hash, raw};

use crate::source::encode;

/// One statement of a command.
pub(crate) enum Statement {
    Insert(Bytes),
    Delete(u128),
    Update(u128, Change),
}

/// What an update does to its document.
pub(crate) enum Change {
    Replace(Bytes),
    Operators(Document),
    Pipeline(Vec<Document>),
}

fn key(document: &RawDocument) -> u128 {
    hash::key_identity(&raw::get(document, "_id").expect("statements name an _id"))
}

fn parsed(document: &RawDocument) -> Document {
    Document::try_from(document).expect("commands of our own are valid")
}

/// The identity of a document by its bytes.
pub(crate) fn key_of(document: &[u8]) -> u128 {
    key(RawDocument::from_bytes(document).expect("a document"))
}

/// Reads a command; its `collectionUUID` and its statements.
pub(crate) fn read(body: &RawDocumentBuf) -> Result<([u8; 16], String, Vec<Statement>), String> {
    let mut statements = Vec::new();
    let (mut uuid, mut name) = (None, String::new());
    for field in body.iter() {
        let (field, value) = field.map_err(|e| e.to_string())?;
        match (field.as_str(), value) {
            ("insert" | "update" | "delete", RawBsonRef::String(coll)) => name = coll.to_owned(),
            ("collectionUUID", RawBsonRef::Binary(binary)) => uuid = binary.bytes.try_into().ok(),
            ("bypassDocumentValidation", _) => {}
            ("documents", RawBsonRef::Array(list)) => {
                for item in list {
                    let RawBsonRef::Document(document) = item.map_err(|e| e.to_string())? else { continue };
                    statements.push(Statement::Insert(Bytes::copy_from_slice(document.as_bytes())));
                }
            }
            ("deletes" | "updates", RawBsonRef::Array(list)) => {
                for item in list {
                    let RawBsonRef::Document(statement) = item.map_err(|e| e.to_string())? else { continue };
                    statements.push(statement_of(statement)?);
                }
            }
            (other, _) => return Err(format!("unknown field {other} in a command")),
        }
    }
    Ok((uuid.ok_or("a command without collectionUUID")?, name, statements))
}

fn statement_of(statement: &RawDocument) -> Result<Statement, String> {
    let q = statement.get_document("q").map_err(|e| e.to_string())?;
    match statement.get("u").map_err(|e| e.to_string())? {
        None => Ok(Statement::Delete(key(q))),
        Some(RawBsonRef::Array(stages)) => {
            let stages = stages.into_iter().map(|stage| match stage {
                Ok(RawBsonRef::Document(stage)) => Ok(parsed(stage)),
                other => Err(format!("a stage is {other:?}")),
            });
            Ok(Statement::Update(key(q), Change::Pipeline(stages.collect::<Result<_, _>>()?)))
        }
        Some(RawBsonRef::Document(u)) => {
            let operators = u.iter().next().is_some_and(|f| f.is_ok_and(|(name, _)| name.as_str().starts_with('$')));
            let change = if operators {
                Change::Operators(parsed(u))
            } else {
                Change::Replace(Bytes::copy_from_slice(u.as_bytes()))
            };
            Ok(Statement::Update(key(q), change))
        }
        Some(other) => Err(format!("u is {other:?}")),
    }
}

/// The document after the update.
pub(crate) fn update(before: &Bytes, change: &Change) -> Result<Bytes, String> {
    let mut document = match change {
        Change::Replace(bytes) => return Ok(bytes.clone()),
        _ => parsed(RawDocument::from_bytes(before).expect("a document")),
    };
    match change {
        Change::Replace(_) => unreachable!("returned above"),
        Change::Operators(operators) => {
            for (operator, fields) in operators {
                let fields = fields.as_document().ok_or("an operator without fields")?;
                apply_operator(&mut document, operator, fields)?;
            }
        }
        Change::Pipeline(stages) => {
            for stage in stages {
                apply_stage(&mut document, stage)?;
            }
        }
    }
    Ok(encode(&document))
}

/// The order of the server's `cmpPathsAndArrayIndexes`, for names without dots.
fn in_set_order(a: &str, b: &str) -> std::cmp::Ordering {
    let number =
        |name: &str| name.starts_with(|c: char| c.is_ascii_digit()) && (name.len() == 1 || !name.starts_with('0'));
    match number(a) && number(b) {
        true => a.len().cmp(&b.len()).then_with(|| a.cmp(b)),
        false => a.cmp(b),
    }
}

fn apply_operator(document: &mut Document, operator: &str, fields: &Document) -> Result<(), String> {
    match operator {
        "$set" => {
            // The server appends new fields in an order of its own.
            let mut names: Vec<&String> = fields.keys().collect();
            names.sort_by(|a, b| in_set_order(a, b));
            for name in names {
                document.insert(name.clone(), fields[name].clone());
            }
        }
        "$unset" => {
            for name in fields.keys() {
                document.remove(name);
            }
        }
        other => return Err(format!("unknown operator {other}")),
    }
    Ok(())
}

fn apply_stage(document: &mut Document, stage: &Document) -> Result<(), String> {
    let literal = |value: &Bson| value.as_document().and_then(|d| d.get("$literal").cloned()).ok_or("no $literal");
    for (name, value) in stage {
        match (name.as_str(), value) {
            ("$replaceWith", value) => *document = literal(value)?.as_document().cloned().ok_or("not a document")?,
            (other, _) => return Err(format!("unknown stage {other}")),
        }
    }
    Ok(())
}
