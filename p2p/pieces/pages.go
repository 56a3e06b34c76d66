package pieces

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/dfcache/dfcache/p2p/pieces/backend"
)

// bbolt has no checksum over its pages, follows whatever offset it finds in one
// of them, and takes the older of its two meta pages where the newer one is
// damaged, without a word. So before it opens a file, all of it is read here,
// with reads that fail and do not fault, and every bit that bbolt relies on is
// compared with the others: each page is reached once or is free, each key is
// in its place, nothing is left over between two of them. What is in the
// records is for the caller to check.
//
// The format is bbolt's own, version 2: numbers have the byte order of the
// machine.

const (
	pageHeader    = 16 // id uint64, flags uint16, count uint16, overflow uint32
	leafElement   = 16 // flags, pos, ksize, vsize uint32
	branchElement = 16 // pos, ksize uint32, child uint64
	bucketHeader  = 16 // root uint64, sequence uint64

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10

	// maxPageDepth is more than a tree of 2^64 records needs with the two keys
	// to a page that bbolt never goes below.
	maxPageDepth = 64
)

var native = binary.NativeEndian

// visitor is what a reading of the pages calls.
type visitor interface {
	// bucket begins a bucket. Its records come next.
	bucket(name []byte, sequence uint64) error
	// record has a record of the bucket that began last. Key and value are
	// valid until it returns.
	record(k, v []byte) error
}

// pageReader reads the pages of a bbolt file.
type pageReader struct {
	f        io.ReaderAt
	v        visitor
	pageSize int
	meta     metaPage
	seen     []uint64 // a bit for each page that was reached, or is free
	bufs     [][]byte // one for each level of the tree
}

// metaPage is the part of a meta page that counts.
type metaPage struct {
	pageSize uint32
	root     uint64
	sequence uint64
	freelist uint64
	pages    uint64 // how many pages there are: the number of the first one that never was
	txid     uint64
}

// checkPages reads all pages of the bbolt file at path, and calls v with what is in them.
// It fails at the first thing that is not as bbolt writes it.
func checkPages(path string, v visitor) error {
	f, err := backend.OpenRegular(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// Pages are read in the order of the keys. The disk likes them in a row.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_WILLNEED)
	meta, err := readMetaPages(f, info.Size())
	if err != nil {
		return err
	}
	return newPageReader(f, meta, v).readAll()
}

func newPageReader(f io.ReaderAt, meta metaPage, v visitor) *pageReader {
	r := &pageReader{f: f, v: v, meta: meta, pageSize: int(meta.pageSize), seen: make([]uint64, (meta.pages+63)/64)}
	r.seen[0] = 3 // the meta pages
	return r
}

// readMetaPages reads the two meta pages of a file of size bytes, and returns
// the newer one. A commit writes one of them, in turn, so that both are whole
// and their numbers follow each other, whatever interrupted the last one: the
// 80 bytes that change are in one sector.
func readMetaPages(f io.ReaderAt, size int64) (newest metaPage, err error) {
	first, err := readMetaPage(f, 0)
	if err != nil {
		return newest, fmt.Errorf("meta page 0: %w", err)
	}
	pageSize := first.pageSize
	if pageSize < 1024 || pageSize > 1<<16 || bits.OnesCount32(pageSize) != 1 {
		return newest, fmt.Errorf("meta page 0: pages of %d bytes", pageSize)
	}
	second, err := readMetaPage(f, int64(pageSize))
	if err != nil {
		return newest, fmt.Errorf("meta page 1: %w", err)
	}
	newest, older := first, second
	if second.txid > first.txid {
		newest, older = second, first
	}
	if newest.txid != older.txid+1 || second.pageSize != pageSize || first.txid%2 != 0 {
		return newest, fmt.Errorf("the meta pages are of the changes %d and %d", newest.txid, older.txid)
	}
	if newest.pages < 4 || newest.pages > uint64(size)/uint64(pageSize) {
		return newest, fmt.Errorf("it has %d bytes, want %d pages of %d", size, newest.pages, pageSize)
	}
	return newest, nil
}

func readMetaPage(f io.ReaderAt, at int64) (m metaPage, err error) {
	var page [pageHeader + 64]byte
	if _, err := f.ReadAt(page[:], at); err != nil {
		return m, err
	}
	b := page[pageHeader:]
	sum := uint64(14695981039346656037) // FNV-1a
	for _, c := range b[:56] {
		sum = (sum ^ uint64(c)) * 1099511628211
	}
	switch {
	case native.Uint32(b) != 0xED0CDAED:
		return m, fmt.Errorf("it is not one of bbolt's")
	case native.Uint32(b[4:]) != 2:
		return m, fmt.Errorf("version %d of bbolt's format", native.Uint32(b[4:]))
	case native.Uint64(b[56:]) != sum:
		return m, fmt.Errorf("its checksum is wrong")
	}
	return metaPage{native.Uint32(b[8:]), native.Uint64(b[16:]), native.Uint64(b[24:]),
		native.Uint64(b[32:]), native.Uint64(b[40:]), native.Uint64(b[48:])}, nil
}

func (r *pageReader) readAll() error {
	if err := r.readFreelist(); err != nil {
		return fmt.Errorf("list of free pages: %w", err)
	}
	if err := r.readTree(r.meta.root, 0, nil, nil, r.readBucket); err != nil {
		return err
	}
	for i := range r.meta.pages {
		if r.seen[i/64]&(1<<(i%64)) == 0 {
			return fmt.Errorf("page %d: nothing refers to it", i)
		}
	}
	return nil
}

// page is a page, with those that it goes on in.
type page struct {
	data  []byte
	flags uint16
	count int
}

// readPage reads page id, which must not have been met yet, into the buffer of a level.
func (r *pageReader) readPage(id uint64, level int) (p page, err error) {
	if level >= maxPageDepth {
		return p, fmt.Errorf("page %d: the tree is too deep", id)
	}
	if err := r.meet(id); err != nil {
		return p, err
	}
	for len(r.bufs) <= level {
		r.bufs = append(r.bufs, make([]byte, r.pageSize))
	}
	buf := r.bufs[level]
	at := int64(id) * int64(r.pageSize)
	if _, err := r.f.ReadAt(buf[:r.pageSize], at); err != nil {
		return p, fmt.Errorf("page %d: %w", id, err)
	}
	if got := native.Uint64(buf); got != id {
		return p, fmt.Errorf("page %d: it says that it is page %d", id, got)
	}
	overflow := uint64(native.Uint32(buf[12:]))
	if overflow >= r.meta.pages-id {
		return p, fmt.Errorf("page %d: it goes on for %d pages", id, overflow)
	}
	size := (int(overflow) + 1) * r.pageSize
	if overflow > 0 {
		if len(buf) < size {
			r.bufs[level] = append(make([]byte, 0, size), buf[:r.pageSize]...)[:size]
			buf = r.bufs[level]
		}
		for i := range overflow {
			if err := r.meet(id + 1 + i); err != nil {
				return p, err
			}
		}
		if _, err := r.f.ReadAt(buf[r.pageSize:size], at+int64(r.pageSize)); err != nil {
			return p, fmt.Errorf("page %d: %w", id, err)
		}
	}
	return page{buf[:size], native.Uint16(buf[8:]), int(native.Uint16(buf[10:]))}, nil
}

// meet notes that a page is used, or free.
func (r *pageReader) meet(id uint64) error {
	if id < 2 || id >= r.meta.pages {
		return fmt.Errorf("page %d: there are %d pages", id, r.meta.pages)
	}
	if r.seen[id/64]&(1<<(id%64)) != 0 {
		return fmt.Errorf("page %d: it is used twice", id)
	}
	r.seen[id/64] |= 1 << (id % 64)
	return nil
}

func (r *pageReader) readFreelist() error {
	p, err := r.readPage(r.meta.freelist, 0)
	if err != nil {
		return err
	}
	if p.flags != flagFreelist {
		return fmt.Errorf("page %d: it has the flags %x", r.meta.freelist, p.flags)
	}
	ids, count := p.data[pageHeader:], uint64(p.count)
	if count == 0xFFFF { // then the count is the first number
		count, ids = native.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("page %d: it has %d numbers", r.meta.freelist, count)
	}
	for i := range count {
		if err := r.meet(native.Uint64(ids[8*i:])); err != nil {
			return err
		}
	}
	return nil
}

// readTree reads the tree below page id. Its first key is first, where that is
// not nil, and all of them come before end, where that is not nil.
func (r *pageReader) readTree(
	id uint64, level int, first, end []byte, f func(level int, p page, first, end []byte) error,
) error {
	p, err := r.readPage(id, level)
	if err != nil {
		return err
	}
	switch {
	case p.flags == flagLeaf:
		if p.count == 0 && level > 0 && first != nil {
			return fmt.Errorf("page %d: it is empty", id)
		}
		err = f(level, p, first, end)
	case p.flags == flagBranch && p.count > 0:
		err = r.readBranch(p, level, first, end, f)
	default:
		err = fmt.Errorf("it has the flags %x, and %d elements", p.flags, p.count)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (r *pageReader) readBranch(p page, level int, first, end []byte, f func(int, page, []byte, []byte) error) error {
	next := pageHeader + branchElement*p.count
	var before []byte
	for i := range p.count {
		k, child, err := p.branch(i, &next)
		if err == nil {
			err = inOrder(i, k, before, first, end)
		}
		if err != nil {
			return err
		}
		limit := end
		if i+1 < p.count {
			after := next
			if limit, _, err = p.branch(i+1, &after); err != nil {
				return err
			}
		}
		if err := r.readTree(child, level+1, k, limit, f); err != nil {
			return err
		}
		before = k
	}
	return nil
}

// inOrder checks the key of element i of a page.
func inOrder(i int, k, before, first, end []byte) error {
	switch {
	case i == 0 && first != nil && !bytes.Equal(k, first):
		return fmt.Errorf("its first key is %q, and not %q", k, first)
	case i > 0 && bytes.Compare(before, k) >= 0:
		return fmt.Errorf("key %q comes after %q", k, before)
	case end != nil && bytes.Compare(k, end) >= 0:
		return fmt.Errorf("key %q comes before %q", k, end)
	}
	return nil
}

// part returns size bytes that begin at next, which is where pos, counted from
// element on, has to be, and moves next behind them.
func (p page) part(element int, pos, ksize, vsize uint32, next *int) (k, v []byte, err error) {
	at := *next
	if uint64(element)+uint64(pos) != uint64(at) || ksize == 0 || uint64(ksize)+uint64(vsize) > uint64(len(p.data)-at) {
		return nil, nil, fmt.Errorf("an element has its key at %d, of %d bytes, and %d behind it",
			uint64(element)+uint64(pos), ksize, vsize)
	}
	*next = at + int(ksize) + int(vsize)
	return p.data[at : at+int(ksize)], p.data[at+int(ksize) : *next], nil
}

func (p page) branch(i int, next *int) (k []byte, child uint64, err error) {
	at := pageHeader + branchElement*i
	if *next > len(p.data) {
		return nil, 0, fmt.Errorf("it has %d elements", p.count)
	}
	e := p.data[at:]
	k, _, err = p.part(at, native.Uint32(e), native.Uint32(e[4:]), 0, next)
	return k, native.Uint64(e[8:]), err
}

// leaf calls f for each element of a leaf page.
func (p page) leaf(first, end []byte, f func(flags uint32, k, v []byte) error) error {
	next := pageHeader + leafElement*p.count
	if next > len(p.data) {
		return fmt.Errorf("it has %d elements", p.count)
	}
	var before []byte
	for i := range p.count {
		at := pageHeader + leafElement*i
		e := p.data[at:]
		k, v, err := p.part(at, native.Uint32(e[4:]), native.Uint32(e[8:]), native.Uint32(e[12:]), &next)
		if err == nil {
			err = inOrder(i, k, before, first, end)
		}
		if err == nil {
			err = f(native.Uint32(e), k, v)
		}
		if err != nil {
			return err
		}
		before = k
	}
	return nil
}

// readBucket reads a page of the root, where the buckets are.
func (r *pageReader) readBucket(level int, p page, first, end []byte) error {
	return p.leaf(first, end, func(flags uint32, k, v []byte) error {
		if flags != 1 || len(v) < bucketHeader {
			return fmt.Errorf("%q is not a bucket", k)
		}
		root := native.Uint64(v)
		if err := r.v.bucket(k, native.Uint64(v[8:])); err != nil {
			return err
		}
		if root != 0 {
			if len(v) != bucketHeader {
				return fmt.Errorf("bucket %s has %d bytes", k, len(v))
			}
			return r.readTree(root, level+1, nil, nil, r.readRecords)
		}
		// A small bucket is a page within this one.
		v = v[bucketHeader:]
		if len(v) < pageHeader || native.Uint64(v) != 0 || native.Uint16(v[8:]) != flagLeaf ||
			native.Uint32(v[12:]) != 0 {
			return fmt.Errorf("bucket %s is not a leaf", k)
		}
		return r.readRecords(level, page{v, flagLeaf, int(native.Uint16(v[10:]))}, nil, nil)
	})
}

func (r *pageReader) readRecords(_ int, p page, first, end []byte) error {
	return p.leaf(first, end, func(flags uint32, k, v []byte) error {
		if flags != 0 {
			return fmt.Errorf("%q has the flags %x", k, flags)
		}
		return r.v.record(k, v)
	})
}
