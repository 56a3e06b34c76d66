package pieces

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"

	"go.etcd.io/bbolt"

	"github.com/dfcache/dfcache/digest"
)

// Every value in the metadata is sealed: it ends with a checksum of the bucket,
// the key and the value. And for each bucket there is a sum of what it has, so
// that a record that is lost, or too many, is noticed when the store is opened.
// The functions of this file are the only ones that read or write values.

const sealSize = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// separator stands between the parts of what is summed up.
var separator = []byte{0}

// checksum is what seals the value v of k.
func checksum(bucket, k, v []byte) uint32 {
	var c uint32
	for i, part := range [...][]byte{bucket, k, v} {
		if i > 0 {
			c = crc32.Update(c, castagnoli, separator)
		}
		c = crc32.Update(c, castagnoli, part)
	}
	return c
}

func seal(bucket, k, v []byte) []byte {
	sealed := append(make([]byte, 0, len(v)+sealSize), v...)
	return binary.LittleEndian.AppendUint32(sealed, checksum(bucket, k, v))
}

// unseal returns the value that was sealed, and its checksum.
func unseal(bucket, k, sealed []byte) (v []byte, sum uint32, err error) {
	if n := len(sealed) - sealSize; n >= 0 {
		v, sum = sealed[:n:n], binary.LittleEndian.Uint32(sealed[n:])
		if sum == checksum(bucket, k, v) {
			return v, sum, nil
		}
	}
	return nil, 0, fmt.Errorf("record %q in bucket %s is not what was written", k, bucket)
}

// mustUnseal ends the transaction where the value is damaged: it panics with
// what recoverDamage makes an error of, as bbolt does where a page is damaged.
func mustUnseal(bucket, k, sealed []byte) (v []byte, sum uint32) {
	v, sum, err := unseal(bucket, k, sealed)
	if err != nil {
		panic(err)
	}
	return v, sum
}

// value returns the value of k, or nil where there is none. One that is damaged
// ends the transaction.
func value(tx *bbolt.Tx, bucket, k []byte) []byte {
	sealed := tx.Bucket(bucket).Get(k)
	if sealed == nil {
		return nil
	}
	v, _ := mustUnseal(bucket, k, sealed)
	return v
}

// has reports whether there is a record of k.
func has(tx *bbolt.Tx, bucket, k []byte) bool { return tx.Bucket(bucket).Get(k) != nil }

// get decodes the record under k into a T. It reports false where there is none.
func get[T any](tx *bbolt.Tx, bucket, k []byte) (T, bool, error) {
	var record T
	v := value(tx, bucket, k)
	if v == nil {
		return record, false, nil
	}
	if err := json.Unmarshal(v, &record); err != nil {
		return record, false, fmt.Errorf(
			"%w: record %q in bucket %s of the metadata: %w", digest.ErrCorrupt, k, bucket, err)
	}
	return record, true, nil
}

// put makes record the one of k.
func put(tx *bbolt.Tx, bucket, k []byte, record any) error {
	v, err := json.Marshal(record)
	if err != nil {
		return err
	}
	return putValue(tx, bucket, k, v)
}

// putValue makes v, which may be nil, the value of k.
func putValue(tx *bbolt.Tx, bucket, k, v []byte) error {
	b := tx.Bucket(bucket)
	sealed := seal(bucket, k, v)
	old := b.Get(k)
	if bytes.Equal(old, sealed) {
		return nil
	}
	added := bucketSum{records: 1, sum: uint64(checksum(bucket, k, v)), sequence: b.Sequence()}
	if old != nil {
		_, sum := mustUnseal(bucket, k, old)
		added.records, added.sum = 0, added.sum-uint64(sum)
	}
	if err := b.Put(k, sealed); err != nil {
		return err
	}
	return addToBucket(tx, bucket, added)
}

// removeKeys removes keys given as bucket, key, bucket, key and so on.
func removeKeys(tx *bbolt.Tx, pairs ...[]byte) error {
	for i := 0; i < len(pairs); i += 2 {
		bucket, k := pairs[i], pairs[i+1]
		b := tx.Bucket(bucket)
		old := b.Get(k)
		if old == nil {
			continue
		}
		_, sum := mustUnseal(bucket, k, old)
		if err := b.Delete(k); err != nil {
			return err
		}
		if err := addToBucket(tx, bucket, bucketSum{^uint64(0), -uint64(sum), b.Sequence()}); err != nil {
			return err
		}
	}
	return nil
}

// scan calls f for every key that starts with prefix, until f returns false.
// f must not change the bucket. A value that is damaged ends the transaction.
func scan(tx *bbolt.Tx, bucket, prefix []byte, f func(k, v []byte) bool) {
	c := tx.Bucket(bucket).Cursor()
	for k, v := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
		if v, _ = mustUnseal(bucket, k, v); !f(k, v) {
			return
		}
	}
}

// bucketSum is what bucketSums has of another bucket: how many records there
// are, the sum of their checksums, in whatever order they came, and the last
// number that the bucket has given out.
type bucketSum struct{ records, sum, sequence uint64 }

func (s bucketSum) encode() []byte {
	v := binary.BigEndian.AppendUint64(nil, s.records)
	v = binary.BigEndian.AppendUint64(v, s.sum)
	return binary.BigEndian.AppendUint64(v, s.sequence)
}

func decodeBucketSum(v []byte) (s bucketSum, err error) {
	if len(v) != 24 {
		return s, fmt.Errorf("the sum over a bucket has %d bytes, want 24", len(v))
	}
	return bucketSum{binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:]), binary.BigEndian.Uint64(v[16:])}, nil
}

// addToBucket changes the sum over a bucket.
func addToBucket(tx *bbolt.Tx, bucket []byte, added bucketSum) error {
	sum, err := decodeBucketSum(value(tx, bucketSums, bucket))
	if err != nil {
		panic(err)
	}
	sum = bucketSum{sum.records + added.records, sum.sum + added.sum, added.sequence}
	return tx.Bucket(bucketSums).Put(bucket, seal(bucketSums, bucket, sum.encode()))
}

// createBucket makes a bucket with nothing in it.
func createBucket(tx *bbolt.Tx, bucket []byte) error {
	if tx.Bucket(bucket) != nil {
		return nil
	}
	if _, err := tx.CreateBucket(bucket); err != nil || bytes.Equal(bucket, bucketSums) {
		return err
	}
	return tx.Bucket(bucketSums).Put(bucket, seal(bucketSums, bucket, bucketSum{}.encode()))
}
